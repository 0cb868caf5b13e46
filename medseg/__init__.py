"""medseg: from a folder of DICOM or NIfTI studies to a segmentation model that is validated and kept up to date."""
