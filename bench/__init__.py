"""Many runs side by side: cells and their measures, tables and plots, other packages' attacks."""
