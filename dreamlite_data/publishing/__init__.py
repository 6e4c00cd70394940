"""What a publication is made of: the rows with their images and licences, two file formats, and the card."""
