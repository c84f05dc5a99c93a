"""Hard negative class mining: which identities share a batch, so that they are hard for one another."""
