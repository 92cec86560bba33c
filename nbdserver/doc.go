// Package nbdserver serves block devices by the NBD protocol.
package nbdserver
