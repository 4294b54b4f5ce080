"""The variables of an attack, their optimiser, and the budget that ends the attack."""
