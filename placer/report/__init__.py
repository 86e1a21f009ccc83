"""What people read: Chrome traces, comparisons of timelines, tables of plans. Tables are data until `render`."""
