"""In which order a layer's planes are read and computed: exact optima, bounds, and what reading ahead could gain."""
