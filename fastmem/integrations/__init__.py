"""fastmem inside other packages, one file each."""
