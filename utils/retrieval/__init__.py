"""From descriptors on disk to matches: extraction, contexts, exact and approximate search, maps, first matches."""
