"""What every room may use and none is about: files, downloads, the machine, caches."""
