"""Datasets to evaluate on: trees and folders, positions, positives, protocols, alignment of batches."""
