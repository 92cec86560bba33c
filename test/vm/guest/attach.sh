# cowdev and the kernel's nbd driver: by nbd-client, and by cowdev attach.
. /job/lib.sh

# serve_it BASE COW: a server on $W/s.sock, its process in $server.
serve_it() {
	: > $W/serve.log # what an earlier one has said is not waited for
	$C serve --socket $W/s.sock "$1" "$2" > $W/serve.log 2>&1 &
	server=$!
	wait_for 30 grep -q ready $W/serve.log
}
# stop_it: ends the server in order.
stop_it() {
	kill $server
	wait $server
}
connected() { [ -e /sys/block/nbd0/pid ] && [ "$(cat /sys/block/nbd0/size)" != 0 ]; }
not_connected() { ! [ -e "/sys/block/$1/pid" ]; }

# The kernel's own client on a socket of cowdev serve, for one filesystem.
nbd_client_fs() {
	# None where it is built in; vfat has its code pages besides.
	for m in "$1" $([ "$1" != vfat ] || echo nls_cp437 nls_ascii nls_iso8859-1); do modprobe "$m" 2> /dev/null || true; done
	truncate -s "$2" $W/base.img
	serve_it $W/base.img $W/cow.img
	nbd-client -unix $W/s.sock /dev/nbd0 -C 2 > /dev/null
	wait_for 10 connected
	mkfs_on "$1" /dev/nbd0
	mount -t "$1" /dev/nbd0 /mnt
	fill /mnt
	before=$(du -k $W/cow.img | cut -f1)
	head -c 12000000 /dev/zero | tr '\\0' x > /mnt/big; sync; rm /mnt/big; sync
	[ "$1" = vfat ] || fstrim /mnt
	sync
	umount /mnt
	check_fs "$1" /dev/nbd0
	nbd-client -d /dev/nbd0 > /dev/null
	wait_for 10 not_connected nbd0
	stop_it
	after=$(du -k $W/cow.img | cut -f1)
	[ "$1" = vfat ] || [ "$after" -lt $((before + 6000)) ] || { echo "trimmed space is not given back: $before KiB before, $after KiB after"; return 1; }
	[ "$(du -k $W/base.img | cut -f1)" = 0 ] # nothing was written to the base
	$C check $W/cow.img
	$C merge --quiet $W/base.img $W/cow.img
	serve_it $W/base.img $W/cow.img
	nbd-client -unix $W/s.sock /dev/nbd0 > /dev/null
	wait_for 10 connected
	mount -t "$1" -o ro /dev/nbd0 /mnt
	compare /mnt
	umount /mnt
	nbd-client -d /dev/nbd0 > /dev/null
	wait_for 10 not_connected nbd0
	stop_it
	rm -f $W/*
}
t_nbd_client_ext4() { nbd_client_fs ext4 64M; }
t_nbd_client_xfs() { nbd_client_fs xfs 320M; }
t_nbd_client_btrfs() { nbd_client_fs btrfs 128M; }
t_nbd_client_vfat() { nbd_client_fs vfat 64M; }

# What a union of directories gets wrong, a block device does not: the files'
# identity through their first change, and what is open across it.
t_first_write_keeps_identity() {
	truncate -s 64M $W/base.img
	mke2fs_ -q -t ext4 $W/base.img
	$C mount --driver=loop $W/base.img $W/first.cow /mnt > /dev/null 2>&1
	echo one > /mnt/a; ln /mnt/a /mnt/b; echo lock > /mnt/l; mkdir /mnt/d; touch /mnt/d/old; ln -s a /mnt/s
	umount_and_merge $W/base.img $W/first.cow
	$C mount --driver=nbd $W/base.img $W/cow.img /mnt > /dev/null
	inode=$(stat -c %i /mnt/a)
	exec 5< /mnt/a
	exec 6> /dev/null 7< /mnt/l
	flock -s 7
	echo two >> /mnt/a
	same inode "$(stat -c %i /mnt/a)" "$inode"
	same "hard link" "$(cat /mnt/b)" "$(printf 'one\ntwo')"
	same "open descriptor" "$(cat <&5)" "$(printf 'one\ntwo')"
	echo more >> /mnt/l
	! flock -n /mnt/l true # it is held still
	same "symbolic link" "$(cat /mnt/s)" "$(printf 'one\ntwo')"
	touch /mnt/d/new
	same directory "$(ls /mnt/d | tr '\n' ' ')" "new old "
	mv /mnt/d/old /mnt/d/newer
	same directory "$(ls /mnt/d | tr '\n' ' ')" "new newer "
	rm -r /mnt/d; mkdir /mnt/d
	same "directory made again" "$(ls /mnt/d)" ""
	chmod 700 /mnt/b; same mode "$(stat -c %a /mnt/a)" 700
	truncate -s 3 /mnt/a; same truncated "$(cat /mnt/b)" one
	exec 5<&- 7<&-
	$C umount /mnt
	rm -f $W/*
}
umount_and_merge() { $C umount /mnt; $C merge --quiet --delete "$1" "$2"; }

# The newcomer's way: mkfs, mount, umount, merge.
t_mount_umount_merge() {
	truncate -s 64M $W/base.img
	mke2fs_ -q -t ext4 $W/base.img
	$C mount $W/base.img $W/cow.img /mnt > /tmp/said
	same said "$(cat /tmp/said)" "ready: /dev/nbd0 mounted at /mnt"
	fill /mnt
	fails 1 "mounted at /mnt" $C detach /dev/nbd0
	$C umount /mnt
	no_leftovers
	$C merge --quiet --delete $W/base.img $W/cow.img
	mount -o ro,loop $W/base.img /mnt
	compare /mnt
	umount /mnt
	rm -f $W/*
}

# no_leftovers: no process, no device, no state, no shared memory.
no_leftovers() {
	wait_for 10 no_cowdev
	same "states" "$(ls /run/cowdev | tr '\n' ' ')" ""
	same "live tables" "$(ls /dev/shm | tr '\n' ' ')" ""
	same "connected devices" "$(echo /sys/block/nbd*/pid)" "/sys/block/nbd*/pid"
	same "loop devices" "$(losetup -a)" ""
	! grep cowdev /proc/mounts
}
no_cowdev() { ! pidof cowdev; }

# A partition of an image, which the kernel itself is not asked to find.
t_partition() {
	truncate -s 80M $W/base.img
	# One entry of an MBR: type 83, sectors 2048 to 133120.
	printf '\0\0\0\0\x83\0\0\0\0\x08\0\0\0\0\x02\0' | dd of=$W/base.img bs=1 seek=446 conv=notrunc status=none
	printf '\x55\xaa' | dd of=$W/base.img bs=1 seek=510 conv=notrunc status=none
	mke2fs_ -q -t ext4 -E offset=1048576 $W/base.img 60M
	fails 2 "not this one" $C mount --partition 2 $W/base.img $W/cow.img /mnt
	fails 1 "no filesystem" $C mount $W/base.img $W/cow.img /mnt
	$C mount --partition 1 --options noatime $W/base.img $W/cow.img /mnt > /dev/null
	fill /mnt
	$C umount /mnt
	no_leftovers
	$C mount --partition 1 --read-only $W/base.img $W/cow.img /mnt > /dev/null
	compare /mnt
	$C umount /mnt
	no_leftovers
	rm -f $W/*
}

# The server dies, and is handed over, again and again under a filesystem that
# is written, read back and synced.
survive() {
	truncate -s 400M $W/base.img
	$C attach --detach --log $W/attach.log $W/base.img $W/cow.img > /dev/null
	mkfs_on "$1" /dev/nbd0
	mount -t "$1" /dev/nbd0 /mnt
	fio --name=v --directory=/mnt --size=24M --rw=randwrite --bs=4k --ioengine=psync --fsync=32 \
		--rate_iops=200 --verify=crc32c --verify_fatal=1 --do_verify=1 --loops=1000 --time_based --runtime=3600 > $W/fio.log 2>&1 &
	fio=$!
	records & records=$!
	state=/run/cowdev/nbd0.json
	for round in $(seq "$ROUNDS"); do
		sleep 0.7
		old=$(value server_pid $state)
		kill -9 "$old"
		wait_for 60 server_is_not "$old"
		sleep 0.7
		old=$(value server_pid $state)
		kill -USR2 "$(value pid $state)"
		wait_for 60 server_is_not "$old"
		kill -0 $fio || { cat $W/fio.log; echo "fio ended in round $round"; return 1; }
	done
	sleep 0.7
	kill -INT $fio; wait $fio || true
	! grep -i -E 'verify: |err= *[1-9]|error' $W/fio.log
	touch $W/stop; wait $records
	n=$(cat $W/synced)
	same "records that were synced" "$(head -n "$n" /mnt/records | sha256sum)" "$(seq "$n" | sha256sum)"
	fill /mnt
	umount /mnt
	check_fs "$1" /dev/nbd0
	$C detach $W/cow.img
	no_leftovers
	sed -n 's/^.* a server answers again after /measured: gap /p' $W/attach.log
	echo "measured: $n records synced"
	$C mount --read-only $W/base.img $W/cow.img /mnt > /dev/null
	compare /mnt
	$C umount /mnt
	rm -f $W/*
}
# records: appends numbers to a file, syncs each, and notes the last.
records() {
	local n=0
	while [ ! -e $W/stop ]; do
		n=$((n + 1))
		echo $n | dd of=/mnt/records oflag=append conv=notrunc,fsync status=none || exit 1
		echo $n > $W/synced
		usleep 20000
	done
}
server_is_not() { now=$(value server_pid $state); [ -n "$now" ] && [ "$now" != "$1" ]; }
t_survive_ext4() { survive ext4; }
t_survive_xfs() { survive xfs; }

# A device whose only process was killed waits for --resume.
t_resume() {
	truncate -s 64M $W/base.img
	$C attach --detach --supervise=false --timeout 1s $W/base.img $W/cow.img > /dev/null
	mkfs_on ext4 /dev/nbd0
	mount /dev/nbd0 /mnt
	fails 1 "which lives" $C attach --resume $W/cow.img
	for round in 1 2; do
		fill /mnt
		kill -9 "$(value pid /run/cowdev/nbd0.json)"
		echo waits > /mnt/waits
		sync & sync=$!
		sleep 0.3
		$C attach --resume --detach --supervise=$([ $round = 1 ] && echo false || echo true) $W/cow.img > /dev/null
		wait $sync
		compare /mnt
		rm -r /mnt/*
	done
	umount /mnt
	check_fs ext4 /dev/nbd0
	$C detach $W/cow.img
	no_leftovers
	rm -f $W/*
}

# A server that is gone for good ends in errors, not in waiting for ever.
t_gone_for_good() {
	truncate -s 64M $W/base.img
	$C attach --detach --supervise=false --timeout 1s --dead-timeout 2s $W/base.img $W/cow.img > /dev/null
	kill -9 "$(value pid /run/cowdev/nbd0.json)"
	! timeout 60 dd if=/dev/nbd0 of=/dev/null bs=4k count=1 iflag=direct 2> /tmp/said
	grep -q "Input/output error" /tmp/said
	$C detach /dev/nbd0
	no_leftovers
	# With a supervisor whose base is gone it is the same.
	$C attach --detach --dead-timeout 2s $W/base.img $W/cow.img > /dev/null
	mv $W/base.img $W/elsewhere.img
	kill -9 "$(value server_pid /run/cowdev/nbd0.json)"
	wait_for 60 not_connected nbd0
	wait_for 60 no_cowdev
	mv $W/elsewhere.img $W/base.img
	$C detach $W/cow.img # closes the store of a server that never came back
	no_leftovers
	dmesg -c > /dev/null # errors are what was wanted
	rm -f $W/*
}

# A device that is free has its name taken while the server of before still
# closes its store: the end of that one leaves the new device alone.
t_name_taken() {
	for i in 1 2; do truncate -s 16M $W/base$i.img; done
	$C attach --detach $W/base1.img $W/cow1.img > /dev/null
	keeper=$(value pid /run/cowdev/nbd0.json)
	server=$(value server_pid /run/cowdev/nbd0.json)
	kill -STOP "$server"
	kill -TERM "$keeper"
	kill -TERM "$keeper" # a second one changes nothing
	wait_for 20 not_connected nbd0
	$C attach --detach $W/base2.img $W/cow2.img > /tmp/said
	same said "$(cat /tmp/said)" "ready: /dev/nbd0"
	kill -CONT "$server"
	wait_for 30 ended "$keeper"
	dd if=/dev/urandom of=/dev/nbd0 bs=64k count=1 oflag=direct status=none
	same "store of nbd0" "$(value cow /run/cowdev/nbd0.json)" $W/cow2.img
	$C detach $W/cow2.img
	no_leftovers
	rm -f $W/*
}
ended() { ! kill -0 "$1" 2> /dev/null; }

# Many devices at once, and nothing of them afterwards.
t_many_devices() {
	for i in $(seq "$DEVICES"); do truncate -s 16M $W/base$i.img; done
	for round in $(seq "$ATTACHES"); do
		for i in $(seq "$DEVICES"); do
			$C attach --detach --supervise=$([ $((i % 2)) = 0 ] && echo true || echo false) $W/base$i.img $W/cow$i.img > $W/dev$i 2> $W/err$i &
		done
		wait
		same "devices" "$(cat $W/dev* | sort -u | wc -l)" "$DEVICES"
		for i in $(seq "$DEVICES"); do
			dd if=/dev/urandom of="$(sed 's/ready: //' $W/dev$i)" bs=64k count=1 oflag=direct status=none
		done
		for i in $(seq "$DEVICES"); do $C detach $W/cow$i.img & done
		wait
		no_leftovers
	done
	rm -f $W/*
}

t_bad_input() {
	truncate -s 64M $W/base.img
	truncate -s 100 $W/small.img
	: > $W/file
	fails 3 "no such file" $C attach $W/none.img $W/cow.img
	fails 1 "at least one sector" $C attach --supervise=false $W/small.img $W/small.cow
	fails 1 "at least one sector" $C attach $W/small.img $W/small.cow
	fails 2 "not an nbd device" $C attach $W/base.img $W/cow.img /dev/vda
	fails 2 "power of two" $C attach --block-size 1000 $W/base.img $W/cow.img
	fails 2 "expected more than" $C attach --on-full=park=1m --timeout 10s $W/base.img $W/cow.img
	fails 3 "" $C mount $W/base.img $W/cow.img $W/file
	fails 1 "not attached" $C detach $W/base.img
	fails 1 "not attached" $C umount /mnt
	fails 1 "not attached" $C attach --resume $W/cow.img
	$C attach --detach $W/base.img $W/cow.img /dev/nbd5 > /tmp/said 2> /dev/null
	same said "$(cat /tmp/said)" "ready: /dev/nbd5"
	fails 1 "in use, by process" $C attach $W/base.img $W/other.cow /dev/nbd5
	fails 4 "" $C attach $W/base.img $W/cow.img
	$C detach /dev/nbd5
	no_leftovers
	wait_for 10 rmmod nbd
	fails 1 "no nbd driver" $C attach --driver=nbd $W/base.img $W/cow.img
	mkfs_on ext4 $W/base.img
	$C mount --accept-base $W/base.img $W/cow.img /mnt > /tmp/said 2>&1
	grep -q "ready: /dev/loop" /tmp/said
	fill /mnt
	compare /mnt
	$C umount /mnt
	no_leftovers
	modprobe nbd nbds_max=16 max_part=4
	rm -f $W/*
}

if [ "${1:-}" = one ]; then
	one "$2"
	exit
fi
mke2fs_ -q -t ext4 -O ^has_journal -E lazy_itable_init=1,nodiscard /dev/vda
mkdir -p $W /mnt
mount -t ext4 -o noatime /dev/vda $W
rmdir $W/lost+found
modprobe nbd nbds_max=16 max_part=4
modprobe -a loop fuse xfs
scenarios "${@:-}"
