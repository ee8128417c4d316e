"""The end of notebook 06: the trained model merged, exported, checked, and talked to."""
