package nbdserver_test

import (
	"context"
	"fmt"
	"log"
	"net"

	"github.com/cowdev/cowdev/block"
	"github.com/cowdev/cowdev/internal/nbdclient"
	"github.com/cowdev/cowdev/nbdserver"
)

// A program serves a device of its own on one end of a connection, here a pipe
// with its own client at the other end.
func ExampleServer_ServeConn() {
	var device block.Device = newMemDevice(1 << 20) // or a cow.Device

	server, err := nbdserver.New(nbdserver.Config{
		Exports: []nbdserver.Export{{Name: "disk", Device: device}},
	})
	if err != nil {
		log.Fatal(err)
	}
	here, there := net.Pipe()
	go server.ServeConn(there)

	client, err := nbdclient.Greet(here)
	if err != nil {
		log.Fatal(err)
	}
	if err := client.Go("disk"); err != nil {
		log.Fatal(err)
	}
	if _, err := client.WriteAt([]byte("hello"), 4096); err != nil {
		log.Fatal(err)
	}
	p := make([]byte, 5)
	if _, err := client.ReadAt(p, 4096); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s from a device of %d bytes\n", p, client.Size)

	if err := server.Shutdown(context.Background()); err != nil {
		log.Fatal(err)
	}
	// Output: hello from a device of 1048576 bytes
}
