"""Where mamba_ssm.ops.triton has its public names."""
