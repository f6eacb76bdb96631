"""Operations of our own for CPUs, where torch's leave much of what memory and processor can do unused."""
