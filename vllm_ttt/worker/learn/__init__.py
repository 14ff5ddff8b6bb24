"""When steps run, for whom, and how long they take."""
