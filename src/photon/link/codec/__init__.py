"""What a tensor becomes on the wire: stages, each a small file of pure functions, and the pipeline that chains them."""
