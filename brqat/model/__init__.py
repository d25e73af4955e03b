"""Plain float networks. Each conf/model/*.yaml names one; none of them knows of quantization."""
