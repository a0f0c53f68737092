"""Training: the released recipes for DeltaTok from videos and for DeltaWorld from stored tokens."""
