"""Published attacks: what they read from an update before they begin, and their settings of the one loop."""
