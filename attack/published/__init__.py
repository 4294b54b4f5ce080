"""Published attacks: the labels and features that they read beforehand, and their settings of the one loop."""
