"""The data sets that can be read, one file each."""
