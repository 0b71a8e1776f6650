"""Files written whole, lock, signals, seeds, device, processes, reading ahead, the commands' parser."""
