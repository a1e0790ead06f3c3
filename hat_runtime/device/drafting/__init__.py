"""What drafts tokens on the device."""
