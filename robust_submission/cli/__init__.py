"""What every command shares: parsing, errors and exit status, log, files written whole."""
