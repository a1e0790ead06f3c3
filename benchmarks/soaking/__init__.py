"""Long mixed traffic under random faults: what is asked, what goes wrong, and what must stay as it was."""
