"""Everything worth measuring on an accelerator, in one run that ends in time and keeps what it has."""
