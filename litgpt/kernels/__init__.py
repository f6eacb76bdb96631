"""Operations of our own for decoding on CPUs, where torch's leave most of the memory's bandwidth unused."""
