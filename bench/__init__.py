"""Many runs side by side: cells, what is measured in them, tables and plots, other packages' attacks."""
