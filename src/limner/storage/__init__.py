"""Files: whole or absent, verified, named arrays."""
