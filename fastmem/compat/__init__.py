"""Names, signatures and layouts of other packages, on fastmem's ops: `mamba_ssm` and `causal_conv1d`."""
