"""The client: its batch's update, and its defences. The attack never imports this folder."""
