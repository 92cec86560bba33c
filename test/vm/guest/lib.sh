# What the guests' scripts share. Numbers in capitals come from the test.
C=/job/cowdev
W=/work # scratch space on a disk

# scenarios NAME...: runs the functions t_NAME of the script that was started,
# each in a shell of its own for at most LIMIT seconds, and tells how they
# ended. None begins after BUDGET seconds. What takes too long has failed only
# where STRICT is 1: a busy host stops a guest for a minute at a time.
scenarios() {
	local status=0 name from got
	for name in "$@"; do
		from=$SECONDS
		if [ $from -ge "$BUDGET" ]; then
			echo "skip $name: $from s have gone by, the machine is too slow for more"
			continue
		fi
		dmesg -c > /dev/null
		got=0
		timeout -k 5 "$LIMIT" bash "$0" one "$name" > /tmp/out 2>&1 || got=$?
		if [ $got = 0 ]; then
			echo "ok $name"
			sed -n "s/^measured: /measured: $name: /p" /tmp/out
		elif [ $((SECONDS - from)) -ge "$LIMIT" ] && [ "$STRICT" = 0 ]; then
			echo "skip $name: not done in $LIMIT s"
			clean_up
		else
			status=1
			echo "not ok $name: $(tail -n 1 /tmp/out)"
			sed 's/^/    /' /tmp/out | tail -n 60
			dmesg | tail -n 30 | sed 's/^/    kernel: /'
			clean_up
		fi
		echo "took $((SECONDS - from)) s: $name"
	done
	return $status
}

# one NAME: runs one scenario; a command that fails ends it.
one() {
	set -euo pipefail
	trap 'status=$?; case $BASH_COMMAND in return*) ;; *) echo "line $LINENO: $BASH_COMMAND: status $status" >&2 ;; esac' ERR
	set -E
	"t_$1"
	no_errors_in_kernel_log
}

# clean_up gets rid of what a failed scenario left.
clean_up() {
	killall -9 cowdev fio 2>/dev/null
	for d in /sys/block/nbd*; do # or an unmount would wait for a server
		[ -e "$d/pid" ] && nbd-client -d "/dev/${d##*/}" > /dev/null 2>&1
	done
	umount -l /mnt 2>/dev/null
	rm -rf /run/cowdev /dev/shm/cowdev-* $W/*
}

# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
	local end=$((SECONDS + $1))
	shift
	until "$@" > /dev/null 2>&1; do
		if [ $SECONDS -ge $end ]; then echo "gave up waiting for: $*"; return 1; fi
		usleep 50000
	done
}

# same WHAT A B
same() { [ "$2" = "$3" ] || { echo "$1: $2, expected $3"; return 1; }; }

# fails STATUS WORDS COMMAND...: the command ends with the status, and says the
# words.
fails() {
	local want=$1 words=$2 got=0
	shift 2
	"$@" > /tmp/said 2>&1 || got=$?
	[ $got = "$want" ] || { cat /tmp/said; echo "$*: status $got, expected $want"; return 1; }
	grep -q -e "$words" /tmp/said || { cat /tmp/said; echo "$*: does not say: $words"; return 1; }
}

no_errors_in_kernel_log() {
	local found
	found=$(dmesg | grep -E 'I/O error|EXT4-fs (error|warning)|XFS.*([Cc]orruption|[Ss]hut|error)|BTRFS error|FAT-fs.*error|blocked for more' || true)
	[ -z "$found" ] || { echo "kernel: $found"; return 1; }
}

# value NAME FILE: a field of a device's state.
value() { sed -n "s/.*\"$1\": \"\{0,1\}\([^\",]*\).*/\1/p" "$2"; }

# mkfs_on TYPE DEVICE, check_fs TYPE DEVICE
mkfs_on() {
	case $1 in
	ext4) mke2fs_ -q -t ext4 "$2" ;;
	xfs) mkfs.xfs -q -f "$2" ;;
	btrfs) mkfs.btrfs -q -f "$2" ;;
	vfat) mkfs.fat "$2" > /dev/null ;;
	esac
}
check_fs() {
	case $1 in
	ext4) e2fsck -fn "$2" ;;
	xfs) xfs_repair -n "$2" ;;
	btrfs) btrfs check "$2" ;;
	vfat) fsck.fat -n "$2" ;;
	esac > /tmp/fsck 2>&1 || { cat /tmp/fsck; echo "$1 on $2 is not clean"; return 1; }
}
mke2fs_() { /usr/sbin/mke2fs "$@"; }

# fill DIR: files of many sizes, their digests in DIR.sums; some are removed.
fill() {
	local i
	for i in $(seq 12); do head -c $((i * 30011)) /dev/urandom > "$1/f$i"; done
	mkdir "$1/dir"
	mv "$1/f9" "$1/dir/"
	sync
	rm "$1"/f1?
	(cd "$1" && find . -type f | sort | xargs sha256sum) > "/tmp/$(basename "$1").sums"
}
compare() { (cd "$1" && sha256sum -c "/tmp/$(basename "$1").sums" > /tmp/compare 2>&1) || { grep -v OK /tmp/compare; return 1; }; }
