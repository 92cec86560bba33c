#!/usr/bin/busybox sh
# The guest's first process: loads what it takes to reach the disks and the
# port "out", runs /job/run.sh with its output there, and stops the machine.
export PATH=/usr/sbin:/usr/bin:/usr/lib/busybox HOME=/root TERM=dumb LC_ALL=C
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs run /run
ln -sf /proc/self/fd /dev/fd
while read -r m; do modprobe "$m" 2>/dev/null; done < /etc/boot-modules
ifconfig lo up
hostname guest

out=
for try in $(seq 100); do
	for p in /sys/class/virtio-ports/*; do
		[ -e "$p/name" ] && [ "$(cat "$p/name")" = out ] && out=/dev/${p##*/}
	done
	[ -n "$out" ] && [ -e "$out" ] && break
	usleep 20000
done
exec > "$out" 2>&1 < /dev/null

cd /job
echo ready
bash /job/run.sh
echo "exit $?"
sync
poweroff -f
