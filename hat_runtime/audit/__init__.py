"""How much of a text hidden states give away: attacks on the split model, by what the attacker knows."""
