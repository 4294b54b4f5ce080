"""The command line: flags and their texts, settings, seeds, device, Ctrl-C, provenance."""
