"""Speed of the project's own code paths, beside a peer in the same process."""
