"""Read and write weights in the layouts of Hugging Face and PEFT."""
