"""What a run will take, before it is started: counts, hours, memory on hardware that is not here."""
