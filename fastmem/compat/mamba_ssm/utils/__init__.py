"""Where mamba_ssm.utils has its public names."""
