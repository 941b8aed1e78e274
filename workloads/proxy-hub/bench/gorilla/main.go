// A hub for comparison, in the shape that Go hubs have: gorilla/websocket, a goroutine that reads, a goroutine that
// writes, a channel of 256 messages. It welcomes peers and pings them, nothing else.
package main

import (
	"log"
	"net/http"
	"os"
	"syscall"
	"time"

	"github.com/gorilla/websocket"
)

var upgrader = websocket.Upgrader{Subprotocols: []string{"proxyhub.v3"}, CheckOrigin: func(*http.Request) bool { return true }}

func serve(w http.ResponseWriter, r *http.Request) {
	conn, err := upgrader.Upgrade(w, r, nil)
	if err != nil {
		return
	}
	send := make(chan []byte, 256)
	go func() {
		every := time.NewTicker(12 * time.Second)
		defer every.Stop()
		defer conn.Close()
		for {
			select {
			case message, ok := <-send:
				if !ok || conn.WriteMessage(websocket.BinaryMessage, message) != nil {
					return
				}
			case <-every.C:
				if conn.WriteMessage(websocket.PingMessage, nil) != nil {
					return
				}
			}
		}
	}()
	defer close(send)
	for {
		_, message, err := conn.ReadMessage()
		if err != nil {
			return
		}
		if len(message) > 0 && message[0] == 1 {
			send <- append([]byte{2, 0, 0, 0, 0}, []byte(`{"hub":"g","heartbeat_seconds":12,"max_tunnels":32,"window":262144,"address":"","country":"XX"}`)...)
		}
	}
}

func main() {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) == nil {
		limit.Cur = limit.Max
		_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)
	}
	http.HandleFunc("/ws", serve)
	log.Fatal(http.ListenAndServe(os.Args[1], nil))
}
