"""What each session has learned: in memory, its earlier versions, and as files."""
