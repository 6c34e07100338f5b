"""The artifact: specs, the bundle file, fingerprints, PEFT adapters in and out. No torch here."""
