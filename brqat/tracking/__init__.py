"""Where a run's figures go: files in its folder, always, and a dashboard if one is wanted."""
