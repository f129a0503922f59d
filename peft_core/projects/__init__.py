"""Projects: what each is trained on, when it is retrained by itself, and bringing its adapter up to date."""
