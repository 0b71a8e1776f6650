"""All that touches a photo's file: listing, decoding, EXIF, transforms, batches."""
