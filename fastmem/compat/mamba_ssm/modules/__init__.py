"""Where mamba_ssm.modules has its public names."""
