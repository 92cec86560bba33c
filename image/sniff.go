package image

import "bytes"

// FormatStore is what Sniff calls a store of this project.
const FormatStore = "a cowdev store"

// Formats other than raw that an image's first bytes may show.
var magics = []struct {
	format string
	at     int
	magic  string
}{
	{FormatStore, 0, "cowdevCS"},
	{"qcow2", 0, "QFI\xfb"},
	{"VMDK", 0, "KDMV"},
	{"VMDK", 0, "# Disk DescriptorFile"},
	{"VHDX", 0, "vhdxfile"},
	{"VHD", 0, "conectix"},
	{"VDI", 64, "\x7f\x10\xda\xbe"},
	{"squashfs", 0, "hsqs"},
	{"gzip", 0, "\x1f\x8b\x08"},
	{"xz", 0, "\xfd7zXZ\x00"},
	{"zstd", 0, "\x28\xb5\x2f\xfd"},
	{"bzip2", 0, "BZh"},
}

// Sniff returns the name of the format that the image looks to be in, or "".
// It is for a warning only: a guest can write such bytes into a raw image.
func (b *Base) Sniff() string {
	head := make([]byte, 512)
	n, _ := b.ReadAt(head, 0)
	for _, m := range magics {
		if n >= m.at && bytes.HasPrefix(head[m.at:n], []byte(m.magic)) {
			return m.format
		}
	}
	return ""
}
