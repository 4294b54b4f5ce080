"""Solvers that know no network."""
