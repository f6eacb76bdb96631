"""One model on several devices or in several processes."""
