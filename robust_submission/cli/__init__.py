"""What every command shares: parsing, errors and exit status, whole files, provenance."""
