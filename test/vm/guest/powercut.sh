# Two filesystems, on stores that lie on /dev/vda and /dev/vdb, are written
# until the power is cut. A file whose sync has returned is told of by a line
# "synced TYPE NUMBER": from then on it must be found.
. /job/lib.sh
set -eu
modprobe nbd nbds_max=4
modprobe xfs

# prepare TYPE STORE DIR
prepare() {
	truncate -s 320M "/tmp/$1.base"
	$C create "/tmp/$1.base" "$2"
	mkdir -p "$3"
	device=$($C attach --detach "/tmp/$1.base" "$2")
	device=${device#ready: }
	mkfs_on "$1" "$device"
	mount -t "$1" "$device" "$3"
	sync
}
# churn DIR: files come and go, and nobody asks for them to be synced.
churn() {
	local n=0
	while :; do
		n=$((n + 1))
		head -c $((n % 50 * 4096 + 17)) /dev/zero | tr '\0' c > "$1/churn$((n % 7))"
		rm -f "$1/churn$(((n + 3) % 7))"
	done
}
# records TYPE DIR
records() {
	local n=0
	while :; do
		n=$((n + 1))
		seq $n 3000 | dd of="$2/record$n" conv=fsync status=none
		echo "synced $1 $n"
	done
}
mkdir -p /mnt2
prepare ext4 /dev/vda /mnt
prepare xfs /dev/vdb /mnt2
churn /mnt & churn /mnt2 &
records ext4 /mnt & records xfs /mnt2 &
wait
