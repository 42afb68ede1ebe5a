"""Where mamba_ssm.ops has its public names."""
