"""Segmentation of lesions in ultrasound images with a U-Net."""
